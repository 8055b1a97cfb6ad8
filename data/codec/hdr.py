"""HDR pictures to what an SDR screen shows: PQ and HLG (BT.2100) to BT.709, highlights rolled off as in BT.2390."""

import numpy as np

PQ, HLG = 16, 18  # transfer characteristics as H.273 and FFmpeg number them
WHITE, PEAK = 203.0, 1000.0  # nits of SDR's white in HDR (BT.2408), and of what becomes that white

_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020


def to_sdr(picture: np.ndarray, transfer: int) -> np.ndarray:
    """uint16 RGB (H, W, 3) in BT.2020 with the transfer PQ or HLG to uint8 (H, W, 3)."""
    nits = _PQ_NITS[picture] if transfer == PQ else _hlg_to_nits(picture)
    brightest = nits.max(-1, keepdims=True)  # one gain for all channels keeps the hue
    nits *= np.interp(brightest, _NITS, _GAINS).astype(np.float32)
    light = np.clip(nits @ _TO_BT709.T / WHITE, 0, 1)
    return (255 * light ** (1 / 2.4) + 0.5).astype(np.uint8)


def _hlg_to_nits(picture: np.ndarray) -> np.ndarray:
    """The light of a screen of PEAK, which is the scene's but for its own gamma of 1.2."""
    scene = _HLG_SCENE[picture]
    return PEAK * scene * (scene @ _LUMINANCE)[..., None] ** 0.2


def _pq_to_nits(signal: np.ndarray) -> np.ndarray:
    root = signal ** (32 / 2523)
    return 1e4 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (8192 / 1305)


def _nits_to_pq(nits: np.ndarray | float) -> np.ndarray:
    light = (np.asarray(nits) / 1e4) ** (1305 / 8192)
    return ((0.8359375 + 18.8515625 * light) / (1 + 18.6875 * light)) ** (2523 / 32)


def _hlg_to_scene(signal: np.ndarray) -> np.ndarray:
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)


def _roll_off(nits: np.ndarray) -> np.ndarray:
    """Nits 0 … PEAK to 0 … WHITE: unchanged up to a knee, from there a Hermite spline in PQ."""
    signal, top = np.minimum(_nits_to_pq(nits) / _nits_to_pq(PEAK), 1), _nits_to_pq(WHITE) / _nits_to_pq(PEAK)
    knee = 1.5 * top - 0.5
    t = np.maximum(signal - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    return _pq_to_nits(np.where(signal < knee, signal, spline) * _nits_to_pq(PEAK))


_SIGNAL = np.linspace(0, 1, 2**16)
_PQ_NITS = _pq_to_nits(_SIGNAL).astype(np.float32)
_HLG_SCENE = _hlg_to_scene(_SIGNAL).astype(np.float32)
_NITS = np.geomspace(1, 1e4, 1024)
_GAINS = _roll_off(_NITS) / _NITS
