"""turbojax serve, from the checkout: see --help and turbojax/commands/serve.py."""

from turbojax.app.commands.serve import run

if __name__ == "__main__":
    run()
