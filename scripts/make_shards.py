"""turbojax make_shards, from the checkout: see --help and turbojax/app/commands/make_shards.py."""

from turbojax.app.commands import run

if __name__ == "__main__":
    run("make_shards")
