"""python -m turbojax: the console command."""

from turbojax.app.commands import main

if __name__ == "__main__":
    main()
