"""The web page to try everything on: `attend-excite app`.

`page` says what the page is and `actions` what its functions do; `forms` holds what a visitor asks for,
`limits` what is allowed and `guard` what no request gets past, `words` the chips of a prompt, `models` the
models that may be used, `jobs` how a run waits, reports and is stopped, `opening` what is there before the
first run, `views` the parts that Gradio lacks, `api` the same for programs.
"""
