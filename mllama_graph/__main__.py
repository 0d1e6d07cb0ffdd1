"""python -m mllama_graph key=value ..., and the command mllama-graph."""

import signal
import sys


def main() -> int:
    """Run the command line and return its exit code."""
    if "--version" in sys.argv[1:]:
        from mllama_graph import __version__

        print(f"mllama_graph {__version__}")
        return 0
    # While modules are imported, Ctrl-C ends the process silently rather than with the traceback of an import.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mllama_graph import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
