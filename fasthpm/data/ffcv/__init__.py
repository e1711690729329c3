"""Images in FFCV files: the file's tables, sets of one or several files, our decoder."""
