"""Publishing: claims become published paths, and signatures are made. The only package that holds signing keys."""
