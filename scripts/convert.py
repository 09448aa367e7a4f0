"""turbojax convert, from the checkout: see --help and turbojax/app/commands/convert.py."""

from turbojax.app.commands import run

if __name__ == "__main__":
    run("convert")
