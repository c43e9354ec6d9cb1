"""The web page to try everything on: `attend-excite app`.

`page` says what the page is and `actions` what its functions do; `forms` holds what a visitor asks for,
`limits` what is allowed, `words` the chips of a prompt, `models` the models that may be used, `jobs` how a
run reports and is stopped, `views` the parts that Gradio lacks.
"""
