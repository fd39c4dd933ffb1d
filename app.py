"""Script 2: chat in the browser with the base model and its memory, blended by a fixed or an automatic alpha.

    python app.py --demo                          # what `train_memory_decoder.py --demo` made
    python app.py --model_dir trained_models
    python app.py --demo --ask "Can my landlord keep my deposit?"    # in the terminal, without a page
"""

# ruff: noqa: RUF009 - option makes a dataclass field, whatever its type

import contextlib
import errno
import ipaddress
import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import httpx

from chat import EVERY_RULE, Chat, check_ranges, whole_number, whole_seed
from generation import AUTO
from memory_decoder import read_manifest
from support import command
from support.command import UserError, check_filled, fail, one_line, option
from support.machine import lacks_memory

HERE = Path(__file__).resolve().parent
# The gate lets a sure memory win over a base that is sure and wrong. The demo's memory learned single questions, so an
# earlier answer in front of the next question only misleads it.
DEMO = {"model_dir": str(HERE / "demo/trained_models"), "rule": AUTO, "temperature": 0.2, "max_turns": 0, "no_repeat": 8}
GRADIOS_HOST = "127.0.0.1"  # gradio needs its port to be free here too, wherever it listens
AUTH_VARIABLE = "MEMORY_DECODER_AUTH"
PORT_IN_USE = "Port {} is in use; name another with --server_port."


class WholeNumber(int):
    """A whole number on the command line. It may be written as 3.0."""

    def __new__(cls, text):
        return whole_number(text)


@dataclass
class Options:
    model_dir: str = option("trained_models", "folder that train_memory_decoder.py wrote")
    base_model: str | None = option(None, "where the base model is now, if not where it was in training")
    ask: str | None = option(None, "write the answer to this question to standard output, and open no page")
    server_name: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens the page to the network, with --auth or --open")
    server_port: WholeNumber | None = option(None, "port; default: the first free one from 7860")
    auth: str | None = option(None, "user:password that page and API ask for; the environment variable MEMORY_DECODER_AUTH keeps "
                                    "it out of the process list")
    open: bool = option(False, "listen beyond this machine without --auth: anyone who reaches it may use it")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 and so on, or mps")
    compile: bool = option(False, "compile the base first: on a CPU with bfloat16 a token then takes about a quarter less time; "
                                  "the first start takes up to a minute longer; needs a C++ compiler")
    rule: str = option("logits", "blend rule that the page starts with", choices=list(EVERY_RULE))
    alpha: float | None = option(None, "where the page's alpha slider starts; default: what training chose for the rule")
    temperature: float = option(0.7, "where the page's temperature slider starts")
    seed: WholeNumber | None = option(None, "what the page's seed field starts with; default: a new draw every time")
    max_turns: WholeNumber = option(100, "earlier turns of the chat that an answer reads, as many as fit; 0: the question alone")
    no_repeat: WholeNumber = option(0, "no run of this many tokens comes twice in an answer, 0: any may; the page starts with it")
    demo: bool = option(False, "open what train_memory_decoder.py --demo made")

    def __post_init__(self):
        self.model_dir = os.path.expanduser(self.model_dir)  # a shell does not expand the ~ of --model_dir=~/memory
        self.base_model = self.base_model and os.path.expanduser(self.base_model)

    def check(self):
        """Raise UserError for a value that cannot work, before anything is loaded."""
        check_filled(self, "model_dir", "base_model", "device")
        check_ranges(temperature=self.temperature, no_repeat=self.no_repeat)
        if self.alpha is not None:
            check_ranges(alpha=self.alpha)
        whole_seed(self.seed)
        if self.max_turns < 0:
            raise UserError(f"--max_turns must be at least 0, not {self.max_turns}.")


def parse_options(arguments=None):
    return command.parse_options(Options, __doc__.split("\n")[0], arguments, {"demo": DEMO})


def ask(chat, options):
    """Write an answer to standard output, token by token."""
    alpha = chat.chosen_alpha(options.rule) if options.alpha is None else options.alpha
    answer = chat.begin(options.ask, rule=options.rule, alpha=alpha, temperature=options.temperature, no_repeat=options.no_repeat,
                        seed=options.seed)
    for _ in chat.write(answer):
        print(answer.tokens[-1]["text"], end="", flush=True)
    print()


def training_command(options):
    """The command that trains the missing memory."""
    usual = DEMO["model_dir"] if options.demo else Options.model_dir
    line = "python train_memory_decoder.py" + (" --demo" if options.demo else "")
    return line + ("" if options.model_dir == usual else f" --output_dir {shlex.quote(options.model_dir)}")


def host_of(name):
    """The numeric address of a server name, IPv4 before IPv6. Raises OSError or UnicodeError if there is none."""
    name = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return min(found, key=lambda info: info[0] == socket.AF_INET6)[4][0]


def bind(host, port):
    """Raise OSError if nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # as the server does; otherwise a port in use on IPv4 would count
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind((host, port))


def check_address(options):
    """Raise UserError if the page cannot listen at the address of the options."""
    port = options.server_port
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--server_port must be from 1 to 65535, not {port}.")
    try:
        bind(host_of(options.server_name), port or 0)
        bind(GRADIOS_HOST, port or 0)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(PORT_IN_USE.format(port)) from None
        reason = getattr(error, "strerror", None) or "this is no host name"
        raise UserError(f"The page cannot listen at {options.server_name}: {reason}; check --server_name and "
                        "--server_port.") from None


def credentials(options):
    """The (user, password) that the page asks for, or None. Raises UserError for a malformed value.

    --auth goes before the environment variable. An empty value is malformed, so that a failed script does not open the page.
    """
    name, given = ("--auth", options.auth) if options.auth is not None else (AUTH_VARIABLE, os.environ.get(AUTH_VARIABLE))
    if given is None:
        return None
    user, _, password = given.partition(":")
    if not user.strip() or not password:
        raise UserError(f"{name} must have the form user:password, with neither part empty.")
    return user.strip(), password  # gradio strips the name that a visitor types


def check_access(options, login):
    """Raise UserError if other machines could use the page without a login and --open does not allow it."""
    if login is None and not options.open and not ipaddress.ip_address(host_of(options.server_name)).is_loopback:
        raise UserError(f"Other machines could use the page at {options.server_name}; give --auth user:password, or --open to let "
                        "anyone who reaches it use it.")


def free_port(host):
    """The first port that is free at a host. Raises UserError if there is none."""
    from gradio.http_server import INITIAL_PORT_VALUE, TRY_NUM_PORTS

    for port in range(INITIAL_PORT_VALUE, min(INITIAL_PORT_VALUE + TRY_NUM_PORTS, 65536)):
        with contextlib.suppress(OSError):
            bind(host, port)
            bind(GRADIOS_HOST, port)
            return port
    raise UserError(f"The {TRY_NUM_PORTS} ports from {INITIAL_PORT_VALUE} on are in use; name another with --server_port.")


def serve(options, manifest):
    """Open the page and wait. When a visitor asks for the memory that was trained since, open a page of that one."""
    login = credentials(options)
    check_address(options)
    check_access(options, login)
    chat = Chat.open(options, manifest) if manifest else None
    # Gradio requests its own page to see that it is up. No proxy may come between, not even one that httpx does not support.
    # This comes after the base model is loaded, which may need the proxy.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = os.environ.get(name, "") + ",*"
    os.environ["GRADIO_SERVER_NAME"] = GRADIOS_HOST  # gradio reads it for nothing else
    from web import page  # here, since gradio takes seconds to import and an answer in the terminal does not need it

    host = host_of(options.server_name)
    port = options.server_port or free_port(host)
    address = {"server_name": f"[{host}]" if ":" in host else host, "server_port": port, "auth": login}
    try:
        if chat is None:
            print(f"Nothing is trained yet in {options.model_dir}; the page says how.", flush=True)
            page.launch(page.untrained(options.model_dir, training_command(options), options.demo), **address)
        while chat:
            opened = page.Page(chat, options)
            page.launch(opened.build(), **address)
            chat = opened.followed_by()
    except httpx.TransportError as error:  # gradio could not open the page itself
        raise UserError(f"The page cannot be reached at {options.server_name} ({one_line(error)}); check --server_name.") from None


def main():
    command.print_all_characters()
    options = parse_options()
    try:
        options.check()
        manifest = read_manifest(options.model_dir)
        if options.ask is None:
            serve(options, manifest)
        elif manifest:
            ask(Chat.open(options, manifest), options)
        else:
            raise UserError(f"Nothing is trained yet in {options.model_dir}; run `{training_command(options)}` first.")
    except UserError as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader closed the pipe; without this, Python would report it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:
            sys.exit(fail(f"A file could not be read or written: {one_line(error)}."))
        if "port" not in str(error).lower():
            raise
        sys.exit(fail(PORT_IN_USE.format(options.server_port) if options.server_port else one_line(error)))
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        sys.exit(fail("There is not enough memory; close other programs, or name another --device."))


if __name__ == "__main__":
    main()
