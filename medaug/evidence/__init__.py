"""Papers that say what a set of images is, filled from the records of the stages; what nobody recorded stays a visible blank."""
