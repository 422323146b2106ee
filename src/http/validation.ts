import type { FastifyRequest, FastifySchemaValidationError } from 'fastify'
import { escapePointer, type FieldError, type IdentityRules } from '../identity/identity.ts'

/** An error of Ajv with `verbose`. */
interface SchemaError extends FastifySchemaValidationError {
  propertyName?: string
  parentSchema?: { description?: string }
}

/** Returns the errors of a request that does not match the schemas of its route. */
export function fieldErrors (request: FastifyRequest): FieldError[] {
  const { validation, validationContext: context } = request.validationError ?? {}
  const bodyErrors = context === 'body' ? validation : []
  // Fastify validates the query only when the body is valid.
  const validateQuery = request.getValidationFunction('querystring')
  const queryErrors = validateQuery?.(request.query) === false ? validateQuery.errors : []
  // A pointer leads into the body, so `detail` names the query parameter.
  const named = asFieldErrors(queryErrors)
    .map(({ pointer, detail }) => ({ pointer: '', detail: `query parameter ${pointer.slice(1)} ${detail}` }))
  return [...asFieldErrors(bodyErrors), ...named]
}

/** Returns the `errors` of an Ajv validator as field errors. */
export function asFieldErrors (errors: unknown): FieldError[] {
  return (errors as SchemaError[]).flatMap(fieldError)
}

/** Returns an error for each rule that an identity breaks. It decides for every route. */
export function checkIdentity (request: FastifyRequest, rules: IdentityRules, identity: unknown): FieldError[] {
  const validate = request.compileValidationSchema(rules.schema)
  const schemaErrors = validate(identity) ? [] : [...asFieldErrors(validate.errors), ...rules.explain(identity)]
  return [...schemaErrors, ...rules.check(identity)]
}

function fieldError (error: SchemaError): FieldError[] {
  const { keyword, instancePath, params, message = '', propertyName, parentSchema } = error
  // Ajv reports an invalid property name twice. The other error has the rule.
  if (keyword === 'propertyNames') return []
  const name = params.missingProperty ?? params.additionalProperty ?? propertyName
  const pointer = name === undefined ? instancePath : `${instancePath}/${escapePointer(String(name))}`
  const detail = {
    required: 'is required',
    additionalProperties: 'is not a known field',
    pattern: parentSchema?.description,
    not: parentSchema?.description
  }[keyword] ?? message.replace('NOT', 'not')
  return [{ pointer, detail }]
}
