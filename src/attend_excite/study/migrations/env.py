"""Alembic's entry: `database.open_database` hands it the connection."""

from alembic import context

from attend_excite.study.database import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
