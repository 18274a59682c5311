"""The reads, fast: dot products of a tile, ADC and accumulation without ever holding all partial
sums."""
