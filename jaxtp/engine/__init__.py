"""The engine: requests come and go, and every step takes along what fits."""
