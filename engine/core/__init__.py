"""The loop, the runner, the engine process and its client."""

import os

# OpenMP's threads spin around a parallel region, because the next one usually follows at once. GNU's default, 300,000
# turns, is milliseconds; where another program wants the core, too, each of the hundreds of regions of a step can cost
# that much (SmolLM2 on two busy cores: 1 token/s by default, 5 like this). The library reads it when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
os.environ.setdefault("KMP_BLOCKTIME", "1")
