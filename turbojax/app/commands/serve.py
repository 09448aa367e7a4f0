"""Serves a page in the browser that makes videos.

    python scripts/serve.py --config=configs/demo.py
    python scripts/serve.py --config=configs/wan1_3b_quant.py --port=8000 --out=outputs/web
    TURBOJAX_PASSWORD=... python scripts/serve.py --config=configs/wan22_i2v_quant.py --host=0.0.0.0 --user=me

The settings are what the page starts with, and the model. Videos are kept in --out=outputs/web with their settings.
--host=127.0.0.1 is this machine alone; 0.0.0.0 is everybody who can reach it. --port=7860.
--user=NAME asks for a name and a password, TURBOJAX_PASSWORD or else asked for here.
Needs gradio: pip install 'turbojax[web]'. Every setting of a configuration can be changed as --config.NAME=VALUE:
"""

import getpass
import os
import sys
import threading

from absl import flags, logging

from turbojax.app import cli
from turbojax.errors import UserError
from turbojax.files import check_folder

FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS)
HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on", flag_values=FLAGS)
PORT = flags.DEFINE_integer("port", 7860, "port to listen on; 0 for a free one", 0, 65535, flag_values=FLAGS)
USER = flags.DEFINE_string("user", None, "name to log in with", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "outputs/web", "folder of the videos", flag_values=FLAGS)


def main() -> None:
    config = cli.read_config(CONFIG, example="configs/demo.py")
    folder = check_folder(OUT.value)
    try:
        from turbojax.app.web.page import Server, build, launch
    except ModuleNotFoundError as missing:
        raise UserError(f"the page needs {missing.name}; pip install 'turbojax[web]'") from missing
    server = Server(config, folder)
    auth = (USER.value, password()) if USER.value else None
    url = launch(build(server), server, host=HOST.value, port=PORT.value, auth=auth)
    if auth is None and HOST.value not in ("127.0.0.1", "localhost", "::1"):
        logging.warning("Whoever reaches %s can use it; --user=NAME asks for a password", HOST.value)
    logging.info("Serving at %s; ctrl-C ends it", url)
    try:
        threading.Event().wait()
    finally:
        server.jobs.close()


def password() -> str:
    """Returns the password to log in with; raises UserError where there is none."""
    given = os.environ.get("TURBOJAX_PASSWORD", "")
    if not given and sys.stdin.isatty():
        given = getpass.getpass("Password for the page: ")
    if not given:
        raise UserError("--user needs a password; set TURBOJAX_PASSWORD")
    return given
