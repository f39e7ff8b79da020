"""What all tests share."""

import gc


def pytest_collection_finish():
    # A million objects of the libraries stay anyway. Accelerate collects garbage at the start of every training, and
    # looking through them takes half a second each time: a third of the seconds of the trainer's tests.
    gc.collect()
    gc.freeze()
