"""`aipo-graph COMMAND`, or `python -m aipo_graph COMMAND`: the commands under one name."""

import sys

from aipo_graph import cli
from aipo_graph.errors import ConfigError
from aipo_graph.load import load, nearest

COMMANDS = {
    "train": "aipo_graph.train:main",
    "evaluate": "aipo_graph.evaluate:main",
    "view": "aipo_graph.view.__main__:command",
    "demo": "aipo_graph.demo.__main__:command",
    "draw": "aipo_graph.draw:command",
}


def command(argv: list[str]) -> None:
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h"):
        print(f"aipo-graph {{{','.join(COMMANDS)}}} ...: the same as python -m aipo_graph.COMMAND; each has --help")
    elif name not in COMMANDS:
        raise ConfigError(f"no command {name!r}{nearest(name, COMMANDS)}")
    else:
        load(COMMANDS[name])(argv[1:])


def main() -> int:
    return cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
