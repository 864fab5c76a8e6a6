"""Reading: shards by path or URL → safe samples, their images and captions; and shards written."""
