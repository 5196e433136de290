"""The reference backend: threads of one process, real buckets, no transport. Read it before writing your own."""
