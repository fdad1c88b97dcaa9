//! From a call that a reader read to the engine and back.

use std::os::fd::AsFd;
use std::time::Duration;

use hostler_protocol::message::Reply;
use hostler_protocol::methods::{CallError, LeaseClosed, Nothing, Reclaimed};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::engine::{Caller, Engine, Passed};
use crate::reader::calls::error_reply;
use crate::reader::message::Asked;

/// Does what a call asks for. `reader` is the pidfd of the process that has what the client passed.
pub(super) async fn answer(engine: &Engine, caller: Caller, call: Asked, reader: impl AsFd) -> Reply {
    match done(engine, caller, call, reader).await {
        Ok(parameters) => Reply { parameters: Some(parameters), ..Reply::default() },
        Err(error) => error_reply(&error),
    }
}

async fn done(
    engine: &Engine,
    caller: Caller,
    call: Asked,
    reader: impl AsFd,
) -> Result<Map<String, Value>, CallError> {
    let passed = |number: u32| Passed { reader: reader.as_fd(), number };
    match call {
        Asked::OpenLease(call) => {
            let deadline = call.deadline_seconds.map(Duration::from_secs);
            results(&engine.open(caller, &call.name, call.owner.map(passed), deadline).await?)
        }
        Asked::Adopt(call) => {
            engine.adopt(caller, call.lease, call.epoch, passed(call.process)).await?;
            results(&Nothing {})
        }
        Asked::ClaimDirectory(call) => {
            let directory = passed(call.directory);
            engine.claim(caller, call.lease, call.epoch, directory, call.scratch).await?;
            results(&Nothing {})
        }
        Asked::RegisterLoop(call) => {
            engine.register_loop(caller, call.lease, call.epoch, passed(call.device)).await?;
            results(&Nothing {})
        }
        Asked::ReportBuild(call) => {
            engine.report_build(caller, &call)?;
            results(&Nothing {})
        }
        Asked::CloseLease(call) => {
            results(&LeaseClosed { report: engine.close(caller, call.lease, call.epoch).await? })
        }
        Asked::Status(_) => results(&engine.status(caller).await?),
        Asked::Why(call) => results(&engine.why(caller, &call.target).await?),
        Asked::Plan(_) => results(&engine.planned(caller).await?),
        Asked::Reclaim(call) => {
            let report = match (call.lease, call.target) {
                (Some(lease), None) => engine.reclaim_now(caller, lease).await?,
                (None, Some(target)) => engine.reclaim_target(caller, &target).await?,
                (Some(_), Some(_)) | (None, None) => {
                    let reason = "name a lease or a target, and not both".to_owned();
                    return Err(CallError::Refused { reason });
                }
            };
            results(&Reclaimed { report })
        }
    }
}

fn results(results: &impl Serialize) -> Result<Map<String, Value>, CallError> {
    match serde_json::to_value(results) {
        Ok(Value::Object(results)) => Ok(results),
        Ok(_) | Err(_) => Err(CallError::Unavailable {
            reason: "the answer could not be written as JSON; this is a bug of hostlerd".to_owned(),
        }),
    }
}
