"""Text-to-video generation in semantic space (SemanticGen, arXiv 2512.20619)."""


def __getattr__(name: str):
    if name == "Generator":  # only who asks for it waits for torch
        from lightning_semgen.generator import Generator

        return Generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
