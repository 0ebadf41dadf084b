"""From text to batches: the corpus, its token shards, the sample order, and the stream that a rank reads."""
