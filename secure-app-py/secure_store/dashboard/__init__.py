"""One static page, served at /."""
