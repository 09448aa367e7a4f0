"""turbojax generate, from the checkout: see --help and turbojax/app/commands/generate.py."""

from turbojax.app.commands import run

if __name__ == "__main__":
    run("generate")
