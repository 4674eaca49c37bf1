"""POST /admin/models/{id}/reload."""


async def test_a_model_is_loaded_anew_by_its_id(client, backend):
    card = backend.cards[0]
    response = await client.post(f"/admin/models/{card.id}/reload")

    assert response.json() == {"model": card.id, "replicas": ["replica-0"]}
    assert backend.reloaded == [card.id]


async def test_an_unknown_model_is_not_loaded(client, backend):
    response = await client.post("/admin/models/none-of-ours/reload")

    assert response.status_code == 404
    assert backend.reloaded == []


async def test_only_this_machine_or_an_admin_may(make_client, backend):
    client = make_client(peer="10.0.0.7")
    response = await client.post(f"/admin/models/{backend.cards[0].id}/reload")

    assert response.status_code == 403
    assert backend.reloaded == []
