"""Token shards: their format, their sources (FineWeb, your own text), and batches made from them."""
