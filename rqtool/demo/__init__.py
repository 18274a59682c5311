"""What the demonstration needs to run offline: images, labels and the float weights of a small
network (see README.md)."""
