"""turbojax convert, from the checkout: see --help and turbojax/commands/convert.py."""

from turbojax.commands.convert import run

if __name__ == "__main__":
    run()
