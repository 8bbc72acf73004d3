"""The embedded default: the checkpoint, its architecture from scratch, and the scenes."""
