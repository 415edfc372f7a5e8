"""`python -m service.metrics`: print docs/metrics.md."""

from service.metrics.reference import page

if __name__ == "__main__":
    print(page(), end="")
