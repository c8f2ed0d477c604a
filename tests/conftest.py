import os

# Two tests run at a time: with two threads each they would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "slow" not in item.keywords)  # the longest first, or it would be the last to end, alone
