"""Which reads a layer needs: planes of weights and inputs, tiles of rows. Standard library only."""
