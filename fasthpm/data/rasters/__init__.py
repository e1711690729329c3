"""Reading pictures that are not 8-bit RGB: a file per family of containers, one `Raster` for all of them."""
