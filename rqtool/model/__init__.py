"""Model files and data files in: networks with float weights, images with labels. Nothing in a file
is executed."""
