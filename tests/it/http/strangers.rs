//! Web pages that operate a browser: they must not operate the pump through it.

use reqwest::{Method, RequestBuilder};

use crate::support::client::ask;
use crate::support::process::Database;
use crate::support::scene::Scene;

const STOP: &str = "/admin/v1/pump/stop";

#[tokio::test]
async fn a_page_of_another_site_is_refused_whatever_it_asks_for() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    let own = format!("http://{}", scene.process.address());
    for (method, path) in [
        (Method::POST, STOP),
        (Method::POST, "/v1/queues/q/messages"),
        (Method::GET, "/v1/messages"),
        (Method::OPTIONS, "/v1/messages"),
        (Method::POST, "/livez"),
    ] {
        for (name, value) in [
            ("sec-fetch-site", "cross-site"),
            ("origin", "https://evil.example"),
            ("origin", "http://localhost:3000"),
            ("origin", "null"),
        ] {
            let request = scene.client.request(method.clone(), path).header(name, value);
            refused(request).await;
        }
        // Its own Origin does not make up for what the browser says.
        let request = scene.client.request(method, path).header("origin", &own);
        refused(request.header("sec-fetch-site", "cross-site")).await;
    }
    assert_eq!(scene.client.get("/admin/v1/pump").await.json()["state"], "running");
    assert_eq!(scene.client.all("/v1/messages").await.len(), 0);
}

#[tokio::test]
async fn its_own_pages_and_those_who_only_look_at_its_health_are_let_in() {
    let scene = Scene::new().await;
    let own = format!("http://{}", scene.process.address());
    let page = scene.client.request(Method::POST, STOP).header("origin", own);
    ask(page.header("sec-fetch-site", "same-origin")).await.expect(200);
    let typed = scene.client.request(Method::GET, "/admin/v1/pump");
    ask(typed.header("sec-fetch-site", "none")).await.expect(200);
    for path in ["/livez", "/readyz"] {
        let elsewhere = scene.client.request(Method::GET, path).header("host", "pump.example");
        ask(elsewhere.header("sec-fetch-site", "cross-site")).await.expect(200);
    }
}

#[tokio::test]
async fn a_name_that_was_pointed_here_is_refused() {
    let scene = Scene::new().await;
    let port = scene.process.address().port();
    let with_host = |host: String| {
        let request = scene.client.request(Method::GET, "/v1/messages").header("host", &host);
        request.header("origin", format!("http://{host}"))
    };
    for name in ["evil.example", "127.0.0.1.evil.example"] {
        refused(with_host(format!("{name}:{port}"))).await;
    }
    for name in ["localhost", "127.0.0.1", "[::1]"] {
        ask(with_host(format!("{name}:{port}"))).await.expect(200);
    }
}

#[tokio::test]
async fn behind_a_proxy_any_name_will_do() {
    let scene = Scene::with_flags(Database::sqlite(), &["--insecure"]).await;
    let request = scene.client.request(Method::GET, "/v1/messages").header("host", "pump.example");
    let own = request.try_clone().expect("it can be sent twice");
    ask(own.header("origin", "https://pump.example")).await.expect(200);
    refused(request.header("origin", "https://evil.example")).await;
}

async fn refused(request: RequestBuilder) {
    assert_eq!(ask(request).await.expect(403).problem(), "cross-site");
}
