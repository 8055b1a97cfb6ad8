"""Text-to-video generation in semantic space (SemanticGen, arXiv 2512.20619)."""
