"""turbojax serve, from the checkout: see --help and turbojax/app/commands/serve.py."""

from turbojax.app.commands.serve import run

if __name__ == "__main__":
    run()
