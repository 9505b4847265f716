"The program medsim as a module: python -m medsim."
import sys

from medsim.bench.command import main

if __name__ == "__main__": sys.exit(main())
