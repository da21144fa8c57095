"""`python -m keras_mha_cli` is `keras-mha`."""

import sys

from keras_mha_cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
