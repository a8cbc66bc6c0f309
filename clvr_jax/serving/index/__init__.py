"""The index of loops, in SQLite or PostgreSQL, and their files, in a directory or a bucket; replicas share both."""
