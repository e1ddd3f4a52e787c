"""What the Python programs of the tests have in common: when to ask, and what to print. See README.md."""

import os
import select
import sys
import time

ENDPOINT = os.environ.get("STS_ENDPOINT")


def tell(word, *rest):
    print(word, *(" ".join(str(part).split()) for part in rest), flush=True)


def run(version, make):
    """`make` gives a fresh pair: a function that loads the access key, and one that asks whose it is."""
    tell("version", version)
    loads = None if sys.argv[-1] == "watch" else int(sys.argv[-1])
    load, identify = make()
    last = None
    while loads != 0:
        begin = time.monotonic()
        try:
            key = load()
            took = (time.monotonic() - begin) * 1000
            if loads or key != last:
                tell("key", key, f"{took:.1f}")
                if ENDPOINT:
                    identity(identify)
            last = key
        except Exception as error:  # whatever it is, it belongs into the report
            tell("error", f"{type(error).__name__}: {error}")
        if loads is None:
            select.select([], [], [], 0.3)  # `time.sleep` fails where the clock has been shortened
        else:
            loads -= 1
            load, identify = make()


def identity(identify):
    try:
        tell("identity", identify())
    except Exception as error:
        tell("identity-error", f"{type(error).__name__}: {error}")
