"""Reading and writing image files: the only room that knows file formats. Sizes are capped and nothing is invented."""
