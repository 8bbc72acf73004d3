"""The included default: the checkpoint, its architecture from scratch, and the scenes."""
