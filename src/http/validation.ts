import type { FastifyRequest, FastifySchemaValidationError } from 'fastify'
import { escapePointer, type FieldError } from '../identity/identity.ts'

/** An error as Ajv gives it with `verbose`. */
interface SchemaError extends FastifySchemaValidationError {
  propertyName?: string
  parentSchema?: { description?: string }
}

/** What a route's schemas found wrong with a request that they did not let pass. */
export function fieldErrors (request: FastifyRequest): FieldError[] {
  const { validation, validationContext: context } = request.validationError ?? {}
  const inBody = context === 'body' ? validation : []
  // Fastify looks at the query only if the body is right.
  const validateQuery = request.getValidationFunction('querystring')
  const inQuery = validateQuery?.(request.query) === false ? validateQuery.errors : []
  // A pointer leads into the body; what is wrong with the query can only be told.
  const told = asFieldErrors(inQuery)
    .map(({ pointer, detail }) => ({ pointer: '', detail: `query parameter ${pointer.slice(1)} ${detail}` }))
  return [...asFieldErrors(inBody), ...told]
}

/** What a validator's `errors` say. */
export function asFieldErrors (errors: unknown): FieldError[] {
  return (errors as SchemaError[]).flatMap(fieldError)
}

function fieldError (error: SchemaError): FieldError[] {
  const { keyword, instancePath, params, message = '', propertyName, parentSchema } = error
  // Ajv reports a bad property name twice; the other error knows the rule.
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
