"""`attend-excite app`: the web page."""

from __future__ import annotations

from typing import Annotated

import typer

from attend_excite.cli.messages import failures_as_sentences, quieten_libraries


def web_page(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model that visitors may choose, named as for `generate`; repeat for more. "
            "The server loads no other.",
            show_default="stickers",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", show_default="the first free one from 7860 on")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Ask visitors to log in as this user.")] = None,
    password: Annotated[
        str | None,
        typer.Option(help="The user's password; safer in the environment.", envvar="ATTEND_EXCITE_PASSWORD"),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also ask Gradio's servers for a public address.")
    ] = False,
) -> None:
    """Open a web page to try everything on."""
    with failures_as_sentences():
        try:
            import gradio  # noqa: F401
            import limits  # noqa: F401
            import secure  # noqa: F401
        except ImportError as error:
            raise ValueError(f"the web page needs {error.name}: pip install 'attend-excite[web]'") from None
        if (user is None) != (password is None):
            raise ValueError("a login needs both: give --user and --password")

        from attend_excite.app.page import serving

        quieten_libraries()
        login = None if user is None or password is None else (user, password)
        with serving(model or ["stickers"], host=host, port=port, login=login, share=share) as page:
            for address in filter(None, (page.local_url, page.share_url)):
                print(f"the page is at {address}", flush=True)
            page.block_thread()
