import sys

from ministral_jax.cli import main

sys.exit(main())
