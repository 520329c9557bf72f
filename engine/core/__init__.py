"""The loop, the runner, the engine process and its client."""

import os

# OpenMP's threads spin around a parallel region, because the next one usually follows at once. Where another program
# wants the core, too, that waiting is lost in each of the hundreds of regions of a step: hence a third of GNU's default
# of 300,000 turns. Far fewer make the threads sleep between regions. The library reads it when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
os.environ.setdefault("KMP_BLOCKTIME", "1")
