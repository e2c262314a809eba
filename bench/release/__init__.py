"""A data owner's own images, protected for release (bench protect)."""
