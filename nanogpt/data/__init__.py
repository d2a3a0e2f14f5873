"""Token shards: their format, where they come from (FineWeb, own text), and the batches made of them."""
