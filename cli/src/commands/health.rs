//! `cairn health`: whether a server serves, by the standard health protocol of gRPC.

use crate::{
    args::{Health, Shared},
    failure::{FAILED, Failure, say},
    json,
    output::Out,
};
use cairn_proto::{
    Error,
    net::{Connect, SystemNetwork, Traffic, channel},
};
use std::sync::Arc;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

pub async fn run(shared: &Shared, health: Health) -> Result<(), Failure> {
    let network: Arc<dyn Connect> = Arc::new(SystemNetwork);
    let channel = channel(&network, &health.uri, Traffic::Small).map_err(Failure::at(&health.uri))?;
    let mut client = HealthClient::new(channel);
    let asked = client.check(HealthCheckRequest::default());
    let answer = match tokio::time::timeout(shared.reach(), asked).await {
        Ok(answer) => answer.map_err(|status| Failure::at(&health.uri)(Error::from(status)))?,
        Err(_) => {
            let within = humantime::format_duration(shared.reach());
            return Err(Failure::at(&health.uri)(Error::unavailable(format!("no answer within {within}"))));
        }
    };
    let serving = answer.into_inner().status() == ServingStatus::Serving;
    let mut out = Out::new();
    if shared.json {
        out.json(&json::Health { address: health.uri.clone(), serving })?;
    } else if serving {
        out.line("serving")?;
    }
    out.finish()?;
    if serving {
        return Ok(());
    }
    say(&format!("{}: not serving", health.uri));
    Err(Failure::Said(FAILED))
}
