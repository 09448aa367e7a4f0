"""turbojax serve, from the checkout: see --help and turbojax/app/commands/serve.py."""

from turbojax.app.commands import run

if __name__ == "__main__":
    run("serve")
