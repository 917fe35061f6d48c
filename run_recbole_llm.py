"""The command: `python run_recbole_llm.py --model=DLLM2Rec --dataset=ml-100k`; every other --key=value is a setting."""

import sys

from recbole_llm.command import main

if __name__ == "__main__":
    sys.exit(main())
