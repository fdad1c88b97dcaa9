//! From a method's name and arguments to the engine and back.

use std::os::fd::OwnedFd;
use std::time::Duration;

use hostler_protocol::message::{Call, Reply};
use hostler_protocol::methods::{
    Adopt, CallError, ClaimDirectory, CloseLease, LeaseClosed, Method, Nothing, OpenLease, Plan, Reclaim,
    Reclaimed, RegisterLoop, ReportBuild, Status, Why,
};
use hostler_protocol::{INTERFACE, INTERFACE_DESCRIPTION};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::engine::{Caller, Engine};

/// Varlink's own interface, which every service has.
const SERVICE: &str = "org.varlink.service";

/// Why a call has no results.
#[derive(Debug)]
pub(super) enum DispatchError {
    /// One of our own errors.
    Call(CallError),
    /// One of Varlink's, with its details.
    Service(&'static str, Value),
}

impl From<CallError> for DispatchError {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

/// Does what a call asks for.
pub(super) async fn dispatch(
    engine: &Engine,
    caller: Caller,
    call: Call,
    descriptors: Vec<OwnedFd>,
) -> Result<Map<String, Value>, DispatchError> {
    let parameters = call.parameters.unwrap_or_default();
    let Some((interface, method)) = call.method.rsplit_once('.') else {
        return Err(DispatchError::Service("MethodNotFound", json!({ "method": call.method })));
    };
    match interface {
        INTERFACE => ours(engine, caller, method, parameters, descriptors).await,
        SERVICE => service(method, &parameters),
        _ => Err(DispatchError::Service("InterfaceNotFound", json!({ "interface": interface }))),
    }
}

async fn ours(
    engine: &Engine,
    caller: Caller,
    method: &str,
    parameters: Map<String, Value>,
    descriptors: Vec<OwnedFd>,
) -> Result<Map<String, Value>, DispatchError> {
    let mut descriptors: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
    let mut take = |index: u32| {
        let descriptor = descriptors.get_mut(index as usize).and_then(Option::take);
        descriptor.ok_or_else(|| CallError::Refused {
            reason: format!("no descriptor with index {index} was passed"),
        })
    };
    match method {
        OpenLease::NAME => {
            let call: OpenLease = arguments(parameters)?;
            let owner = call.owner.map(&mut take).transpose()?;
            let deadline = call.deadline_seconds.map(Duration::from_secs);
            results(&engine.open(caller, &call.name, owner, deadline).await?)
        }
        Adopt::NAME => {
            let call: Adopt = arguments(parameters)?;
            let process = take(call.process)?;
            engine.adopt(caller, call.lease, call.epoch, &process).await?;
            results(&Nothing {})
        }
        ClaimDirectory::NAME => {
            let call: ClaimDirectory = arguments(parameters)?;
            let directory = take(call.directory)?;
            engine.claim(caller, call.lease, call.epoch, directory, call.scratch).await?;
            results(&Nothing {})
        }
        RegisterLoop::NAME => {
            let call: RegisterLoop = arguments(parameters)?;
            let device = take(call.device)?;
            engine.register_loop(caller, call.lease, call.epoch, &device).await?;
            results(&Nothing {})
        }
        ReportBuild::NAME => {
            engine.report_build(caller, &arguments(parameters)?)?;
            results(&Nothing {})
        }
        CloseLease::NAME => {
            let call: CloseLease = arguments(parameters)?;
            results(&LeaseClosed { report: engine.close(caller, call.lease, call.epoch).await? })
        }
        Status::NAME => {
            let Status {} = arguments(parameters)?;
            results(&engine.status().await?)
        }
        Why::NAME => {
            let call: Why = arguments(parameters)?;
            results(&engine.why(&call.target).await?)
        }
        Plan::NAME => {
            let Plan {} = arguments(parameters)?;
            results(&engine.planned().await?)
        }
        Reclaim::NAME => {
            let call: Reclaim = arguments(parameters)?;
            let report = match (call.lease, call.target) {
                (Some(lease), None) => engine.reclaim_now(caller, lease).await?,
                (None, Some(target)) => engine.reclaim_target(caller, &target).await?,
                (Some(_), Some(_)) | (None, None) => {
                    let reason = "name a lease or a target, and not both".to_owned();
                    return Err(CallError::Refused { reason }.into());
                }
            };
            results(&Reclaimed { report })
        }
        _ => {
            let method = format!("{INTERFACE}.{method}");
            Err(DispatchError::Service("MethodNotFound", json!({ "method": method })))
        }
    }
}

fn service(method: &str, parameters: &Map<String, Value>) -> Result<Map<String, Value>, DispatchError> {
    match method {
        "GetInfo" => results(&json!({
            "vendor": "Hostler",
            "product": "hostlerd",
            "version": env!("CARGO_PKG_VERSION"),
            "url": "",
            "interfaces": [SERVICE, INTERFACE],
        })),
        "GetInterfaceDescription" => match parameters.get("interface").and_then(Value::as_str) {
            Some(INTERFACE) => results(&json!({ "description": INTERFACE_DESCRIPTION })),
            Some(SERVICE) => results(&json!({ "description": SERVICE_DESCRIPTION })),
            Some(other) => Err(DispatchError::Service("InterfaceNotFound", json!({ "interface": other }))),
            None => Err(DispatchError::Service("InvalidParameter", json!({ "parameter": "interface" }))),
        },
        _ => {
            let method = format!("{SERVICE}.{method}");
            Err(DispatchError::Service("MethodNotFound", json!({ "method": method })))
        }
    }
}

/// Varlink's own interface, in its own words where they are names.
const SERVICE_DESCRIPTION: &str = "\
# What every Varlink service answers.
interface org.varlink.service

method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
";

fn arguments<M: Method>(parameters: Map<String, Value>) -> Result<M, DispatchError> {
    serde_json::from_value(Value::Object(parameters)).map_err(|error| {
        // Varlink has room for the parameter's name only; the sentence says it, and what was
        // expected.
        DispatchError::Service("InvalidParameter", json!({ "parameter": error.to_string() }))
    })
}

fn results(results: &impl Serialize) -> Result<Map<String, Value>, DispatchError> {
    match serde_json::to_value(results) {
        Ok(Value::Object(results)) => Ok(results),
        Ok(_) | Err(_) => Err(DispatchError::Call(CallError::Unavailable {
            reason: "the answer could not be written as JSON; this is a bug of hostlerd".to_owned(),
        })),
    }
}

/// An error as Varlink sends it.
pub(super) fn error_reply(error: DispatchError) -> Reply {
    let (name, details) = match error {
        DispatchError::Service(name, details) => (format!("{SERVICE}.{name}"), details),
        DispatchError::Call(error) => {
            let (name, details) = error.on_the_wire();
            (format!("{INTERFACE}.{name}"), details)
        }
    };
    let parameters = match details {
        Value::Object(details) => Some(details),
        _ => None,
    };
    Reply { parameters, error: Some(name), continues: false }
}
